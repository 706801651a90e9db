#!/bin/sh
# On removal, not on an upgrade: dpkg says "remove" then, rpm says 0. A new version is for the instances that are started after it.
# A stop that fails ends the removal: the program is not taken away from under a job. "disable" of the template takes away the
# links of all instances, which would come back with the package, and till then be dead.
set -e
case $1 in
remove | 0)
    if [ -d /run/systemd/system ]; then
        systemctl stop 'leasehold@*.service'
        systemctl --no-reload disable leasehold@.service
    fi
    ;;
esac
