"""A callable's typed interface: hints to JSON Schema, strict validation, encoding of results."""
