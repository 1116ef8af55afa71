"""The wire: protocol buffers with their generated stubs (``v1``), and how errors and identities travel (``wire``)."""
