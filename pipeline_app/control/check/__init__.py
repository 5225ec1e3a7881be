"""Finding mistakes in settings, services and topology before they cost work. Each check is one small function."""
