"""The backends inside other people's libraries. Each module here needs its library, an optional extra."""
