"""The steps of the method as plain functions; none of them knows another."""
