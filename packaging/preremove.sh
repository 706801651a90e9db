#!/bin/sh
# On removal, not on an upgrade: dpkg passes "remove" then, rpm 0. Instances use a new version from
# their next start on. A stop that fails ends the removal, so that a running job keeps its daemon.
# "disable" of the template removes the links of all instances. They would dangle until the package
# comes back.
set -e
case $1 in
remove | 0)
    if [ -d /run/systemd/system ]; then
        systemctl stop 'leasehold@*.service'
        systemctl --no-reload disable leasehold@.service
    fi
    ;;
esac
