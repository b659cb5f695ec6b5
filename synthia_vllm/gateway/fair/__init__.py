"""Whose turn it is: Virtual Token Counter over users, within the room that the engine has."""
