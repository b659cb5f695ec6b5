"""Replies that outlive their gateway: what was generated is journaled in Redis, and goes on at any gateway."""
