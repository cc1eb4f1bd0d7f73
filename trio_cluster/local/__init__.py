"""Local models: functions that a user wrote, in any of their shapes, made into backends."""
