"""How it travels: sessions with a broker, and the broker of the demo and the tests."""
