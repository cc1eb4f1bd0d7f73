"""What clients send: reading and checking the requests of the OpenAI API."""
