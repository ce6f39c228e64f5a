"""The benchmark machine: from configurations to rows, and from rows to tables, claims and the report."""
