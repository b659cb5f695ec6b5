"""What outlives a process: users, keys, and the ledger. SQLite by default, PostgreSQL by URL."""
