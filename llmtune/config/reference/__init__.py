"""The schema as others read it: a JSON Schema for editors, and the page of all keys."""
