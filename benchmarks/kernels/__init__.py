"""Single operations and single layers."""
