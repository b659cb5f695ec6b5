"""HTTP as RFC 9110 and 9112 say: connections, messages, methods, bodies, small answers."""
