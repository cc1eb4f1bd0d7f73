"""Accounts: API keys, the usage journal and the audit log, and the database that keeps them."""
