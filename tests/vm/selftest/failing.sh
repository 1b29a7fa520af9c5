#!/usr/bin/env bash
# In guests of one run, each fails in its way. Run by scripts/steps/vm.sh, which expects run.sh to tell how.
set -euo pipefail
case $VM_GUEST in
    1) # panics
        echo c > /proc/sysrq-trigger
        ;;
    2) # does not end
        sleep 1000
        ;;
    3) # warns, and blocks a task; the command ends well
        echo "<4>WARNING: CPU: 0 PID: $$ at selftest, made up" > /dev/kmsg
        modprobe -a loop ext4
        echo 2 > /proc/sys/kernel/hung_task_timeout_secs
        truncate -s 16M /tmp/disk
        mkfs.ext4 -q /tmp/disk
        mkdir /tmp/mount
        mount -o loop /tmp/disk /tmp/mount
        fsfreeze -f /tmp/mount
        touch /tmp/mount/blocked &
        for _ in {1..40}; do
            if dmesg | grep -q 'blocked for more than'; then break; fi
            sleep 1
        done
        ;;
    4) # switches itself off
        echo o > /proc/sysrq-trigger
        sleep 1000
        ;;
esac
