#!/bin/sh
# Boots a systemd that has all it needs and sees nothing of this machine but
# its files, which it can't change. It is process 1 of PID, mount, IPC and UTS
# namespaces that are its own, in the cgroup that is to be its root, and takes
# the network of its caller.
#   NAME   the machine's name
#   WORK   an empty directory
#   FILES  what to put into its root, which is otherwise this machine's
set -eu
PATH=$PATH:/usr/sbin:/sbin
name=$1 work=$2 files=$3
if [ "${4-}" != inside ]; then
	exec unshare --cgroup --propagation unchanged -- "$0" "$name" "$work" "$files" inside
fi

mount --make-rprivate /
mount -t tmpfs machine "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" overlay "$work/root"
cd "$work/root"
rm -rf etc/systemd/system/*.wants/* etc/systemd/system/leasehold* etc/leasehold
: >etc/fstab
: >etc/machine-id
echo "$name" >etc/hostname
# Where the root has a link to a directory, as for /lib, it stays one.
tar -cC "$files" . | tar -x --keep-directory-symlink --no-overwrite-dir
cat >etc/systemd/system/machine.target <<END
[Unit]
Requires=basic.target dbus.socket
After=basic.target dbus.socket
AllowIsolate=yes
END

mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for dir in run tmp dev; do
	mount -t tmpfs "$dir" "$dir"
done
chmod 1777 tmp
for node in null zero full random urandom tty; do
	: >"dev/$node"
	mount --bind "/dev/$node" "dev/$node"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mkdir -p run/before
pivot_root . run/before
cd /
umount -l /run/before
rmdir /run/before
mount --make-rshared / # as on any machine; credentials get to where they belong by it
exec env -i container=test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
	/lib/systemd/systemd --system --unit=machine.target </dev/null
