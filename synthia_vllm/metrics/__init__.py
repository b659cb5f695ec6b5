"""The series that we export."""
