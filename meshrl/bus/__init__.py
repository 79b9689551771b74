"""The one package that imports nats: connections, logins, the embedded server."""
