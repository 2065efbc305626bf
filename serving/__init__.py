"""Running a model for people: the decoding engine, the HTTP server, the chat page and terminal chat."""
