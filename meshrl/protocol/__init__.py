"""The rules, sans-IO: lanes, sessions, leases, placement, doubt. Callers pass time, ids and bytes."""
