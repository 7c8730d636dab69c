"""Live views: data packed for a browser, and the modules that draw it."""
