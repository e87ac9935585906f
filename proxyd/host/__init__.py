"""What the kernel and systemd give a daemon: sockets, limits, notification."""
