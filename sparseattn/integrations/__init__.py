"""Adapters to other libraries. Each is imported by name, when it is needed, and pulls in what it adapts only then."""
