#!/bin/sh
# On removal, not on an upgrade: dpkg says "remove" then, rpm says 0. A new version is for the instances that are started after it.
set -e
case $1 in
remove | 0)
    if [ -d /run/systemd/system ]; then
        systemctl stop 'leasehold@*.service' || true
    fi
    ;;
esac
