"""What people look at: the command line, later the pages in Flower. They ask control and never the store."""
