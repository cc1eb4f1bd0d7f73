"""A master that is several processes behind one port (``--processes``): the supervisor, and its members."""
