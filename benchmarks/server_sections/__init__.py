"""The sections of server_load.py, and what they need: a server process, clients, targets."""
