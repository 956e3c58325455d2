"""Where two policies differ token by token, and what follows when one of them takes over."""
