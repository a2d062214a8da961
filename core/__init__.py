"""The parts every backend and the harness share; nothing in here knows a backend."""
