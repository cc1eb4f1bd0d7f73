"""HTTP/1.1 and HTTP/2 by hypercorn, in the place of the lean server.

``server.py`` is what a node calls; ``connection.py`` runs hypercorn's protocols on a ``ByteStream``; ``request.py``
stands between hypercorn and the application; ``http2.py`` is what hypercorn lacks for one HTTP/2 stream; ``library.py``
alone imports hypercorn.
"""
