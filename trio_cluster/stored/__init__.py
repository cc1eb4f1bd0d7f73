"""Stored responses and conversations: in the memory of a master, or in the database that several masters share."""
