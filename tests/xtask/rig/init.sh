#!/bin/busybox sh
# The rig's initramfs: load virtio, mount the three disks, unpack this run's files over the root, start systemd.
#   vda  root filesystem, an overlay that is thrown away      vdb  /var/lib/roost      vdc  this run's files, at /rig
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
fail() {
    echo "rig: $*" >/dev/console
    poweroff -f
}
while read -r module; do
    insmod "/modules/$module" || fail "cannot load $module"
done </modules/order
# noinit_itable: no background writing into throw-away disks.
mount -t ext4 -o noatime,noinit_itable /dev/vda /root || fail "cannot mount the root filesystem"
mount -t ext4 -o noatime,noinit_itable /dev/vdb /root/var/lib/roost || fail "cannot mount /var/lib/roost"
mount -t ext4 -o ro /dev/vdc /root/rig || fail "cannot mount this run's files"
tar -x -f /root/rig/overlay.tar -C /root || fail "cannot unpack this run's files"
umount /proc
mount -o move /dev /root/dev
exec switch_root /root /sbin/init
