"""The admin application: the list of models, health, metrics, the OpenAPI description, and routes for operators."""
