"""The admin application: models, health, metrics, the description of the API, and the routes for operators."""
