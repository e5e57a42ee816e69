"""Complete configurations, each a module that is run by name."""
