"""The ASGI layers in front of an engine, and the app that stacks them."""
