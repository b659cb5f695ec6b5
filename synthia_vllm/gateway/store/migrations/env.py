"""Run by alembic for `store.database.migrate`, which passes the open connection."""

from alembic import context

from synthia_vllm.gateway.store.tables import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, transactional_ddl=True
)
context.run_migrations()
