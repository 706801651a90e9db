#!/bin/sh
# The unit file is gone. What an instance was told, in /etc/leasehold, is its owner's.
set -e
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi
