//! holdfast: the command line, and the diskless head.
