#!/usr/bin/env bash
# What ordinary programs do, on three mounts of one cluster: each check writes through one mount and looks through others.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/steps/lib.sh
. scripts/steps/lib.sh
# shellcheck source=scripts/steps/lib/checks.sh
. scripts/steps/lib/checks.sh

start_cluster
open_way
A=$DIR/mnt/0 B=$DIR/mnt/1 C=$DIR/mnt/2
TREE=$DIR/tree # a copy outside: what others change in the sources meanwhile must not matter
mkdir "$TREE"
cp -a fsd rdma scripts docs tests "$TREE"
# Nothing of the user's configuration, and commits need a name.
export HOME=$DIR GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=init.defaultBranch GIT_CONFIG_VALUE_0=main
export GIT_PAGER=cat

git_commits() {
    git init -q "$A/repo"
    cp -r "$TREE/fsd" "$TREE/docs" "$A/repo"
    git -C "$A/repo" add .
    git -C "$A/repo" commit -q -m one
    local n
    for n in 1 2 3 4 5; do
        # Commits from one mount after the other, into one repository.
        local here=$DIR/mnt/$((n % 3))
        echo "$n" >> "$here/repo/file"
        git -C "$here/repo" add file
        git -C "$here/repo" commit -q -m "commit $n"
    done
    same 'commits seen on another mount' 6 "$(git -C "$B/repo" rev-list --count HEAD)"
    same 'changes' '' "$(git -C "$C/repo" status --porcelain)"
}
git_gc_and_fsck() {
    git -C "$B/repo" gc -q --prune=now
    git -C "$C/repo" fsck --full --strict
    git -C "$A/repo" log --oneline | wc -l
}
git_clone() {
    git clone -q --no-local "$A/repo" "$B/clone"
    git -C "$C/clone" fsck --full
    same 'changes' '' "$(git -C "$C/clone" status --porcelain)"
    diff -r --exclude=.git "$A/repo" "$C/clone"
    git -C "$C/clone" checkout -q -b other HEAD~2
    echo other > "$C/clone/other"
    git -C "$C/clone" add other
    git -C "$C/clone" commit -q -m other
    git -C "$A/clone" push -q origin other
    git -C "$B/repo" merge -q -m merge other
    same 'merged' other "$(cat "$A/repo/other")"
}
tar_and_diff() {
    mkdir "$A/tar"
    tar -C "$TREE" -cf - . | tar -C "$A/tar" -xpf -
    diff -r "$TREE" "$B/tar"
    tar -C "$C/tar" -cf "$C/tree.tar" .
    tar -C "$B/tar" --compare -f "$A/tree.tar"
    rm -r "$B/tar"
    refuses ls -d "$A/tar"
}
gcc_and_run() {
    mkdir "$A/gcc"
    local n
    for n in 1 2 3 4 5 6; do echo "int f$n(int x) { return x + $n; }" > "$A/gcc/f$n.c"; done
    cat > "$B/gcc/main.c" << 'CODE'
#include <stdio.h>
int f1(int), f2(int), f3(int), f4(int), f5(int), f6(int);
int main(void) { printf("%d\n", f1(f2(f3(f4(f5(f6(0))))))); return 0; }
CODE
    cat > "$C/gcc/Makefile" << 'CODE'
program: main.o libf.a
	gcc -o $@ main.o -L. -lf
libf.a: f1.o f2.o f3.o f4.o f5.o f6.o
	ar rcs $@ $^
%.o: %.c
	gcc -O1 -g -c -o $@ $<
CODE
    make -s -j3 -C "$B/gcc"
    same 'run on the mount that compiled' 21 "$("$B/gcc/program")"
    same 'run on another' 21 "$("$C/gcc/program")"
    make -q -C "$A/gcc"
    # Changed on one mount, rebuilt on the next, run on the third.
    sleep 0.01
    echo 'int f1(int x) { return x + 100; }' > "$C/gcc/f1.c"
    make -s -C "$A/gcc"
    same 'rebuilt' 120 "$("$B/gcc/program")"
    # A shared library is mapped, private, and from another mount.
    gcc -shared -fPIC -o "$A/gcc/libg.so" "$A/gcc/f1.c"
    echo 'int f1(int); int main(void) { return f1(-93); }' > "$A/gcc/g.c"
    gcc -o "$B/gcc/g" "$B/gcc/g.c" -L"$B/gcc" -lg
    local status=0
    LD_LIBRARY_PATH=$C/gcc "$C/gcc/g" || status=$?
    same 'status of a program with a shared library' 7 $status
}
sqlite_count() {
    local mount=$1 n
    for ((n = 0; n < $2; n++)); do
        sqlite3 "$mount/counter.db" '.timeout 60000' \
            "begin immediate; update counter set n = n + 1; insert into log values ('$mount', $n); commit;" || return 1
    done
}
sqlite_rollback() {
    local each=40 pid_a pid_b
    sqlite3 "$A/counter.db" 'pragma journal_mode=delete; create table counter (n integer); create table log (who text, n integer); insert into counter values (0);'
    sqlite_count "$A" $each & pid_a=$!
    sqlite_count "$B" $each & pid_b=$!
    sqlite_count "$C" $each
    wait $pid_a
    wait $pid_b
    same counter $((3 * each)) "$(sqlite3 "$C/counter.db" 'select n from counter')"
    same rows $((3 * each)) "$(sqlite3 "$B/counter.db" 'select count(*) from log')"
    same integrity ok "$(sqlite3 "$A/counter.db" 'pragma integrity_check')"
    refuses ls "$A/counter.db-journal"
}
sqlite_wal() {
    # The index of the write-ahead log is a shared mapping: one mount only.
    local each=40 pid n
    sqlite3 "$A/wal.db" 'pragma journal_mode=wal; create table counter (n integer); insert into counter values (0);'
    add() {
        for ((n = 0; n < each; n++)); do
            sqlite3 "$A/wal.db" '.timeout 60000' 'update counter set n = n + 1' || return 1
        done
    }
    add & pid=$!
    add
    wait $pid
    same counter $((2 * each)) "$(sqlite3 "$A/wal.db" 'select n from counter')"
    sqlite3 "$A/wal.db" 'create table t (b blob); insert into t select randomblob(5000) from (with recursive c(x) as (select 1 union all select x + 1 from c where x < 500) select x from c);'
    same integrity ok "$(sqlite3 "$A/wal.db" 'pragma integrity_check')"
    sqlite3 "$A/wal.db" 'pragma wal_checkpoint(truncate)'
    same 'rows seen on another mount' 500 "$(sqlite3 "$B/wal.db" 'pragma journal_mode=delete; select count(*) from t' | tail -1)"
    same integrity ok "$(sqlite3 "$C/wal.db" 'pragma integrity_check')"
}
rsync_there_and_back() {
    local tree=$DIR/rsync-tree
    cp -a "$TREE/docs" "$tree"
    ln "$tree/status.md" "$tree/hard"
    ln -s status.md "$tree/soft"
    ln -s /nowhere/at/all "$tree/dangling"
    mkfifo "$tree/fifo"
    chmod 4711 "$tree/hard"
    truncate -s 3M "$tree/sparse"
    setfattr -n user.colour -v blue "$tree/operations.md"
    setfacl -m u:1234:rw "$tree/semantics.md"
    chown 1000:1001 "$tree/architecture.md"
    touch -d '2001-02-03 04:05:06.789012345' "$tree/dependencies.md"
    rsync -aHAXS "$tree/" "$A/rsync/"
    rsync -aHAXS "$B/rsync/" "$DIR/rsync-back/"
    same 'differences on a mount' '' "$(rsync -aHAXSinc --delete "$tree/" "$C/rsync/")"
    same 'differences back' '' "$(rsync -aHAXSinc --delete "$tree/" "$DIR/rsync-back/")"
    same 'links' 2 "$(stat -c %h "$C/rsync/status.md")"
    # Changed on one mount, updated through another, in place.
    echo more >> "$tree/status.md"
    rm "$tree/fifo"
    rsync -aHAX --delete --inplace --no-whole-file "$tree/" "$B/rsync/"
    same 'differences after the update' '' "$(rsync -aHAXinc --delete "$tree/" "$A/rsync/")"
}
fio_one_mount() {
    fio --directory="$A" --ioengine=psync --verify=crc32c --verify_fatal=1 --verify_state_save=0 --size=8M --io_size=12M --group_reporting --output="$DIR/fio.out" \
        --name=random --rw=randwrite --bs=4k --numjobs=2 \
        --name=odd --rw=randwrite --bsrange=512-40k --bs_unaligned=1 --numjobs=2 \
        --name=mixed --rw=randrw --bs=16k --verify_backlog=64 --numjobs=1 \
        --name=sync --rw=randwrite --bs=8k --fsync=16 --numjobs=1 \
        --name=direct --rw=randwrite --bs=64k --direct=1 --numjobs=1 || { tail -20 "$DIR/fio.out"; return 1; }
}
fio_two_mounts() {
    # fio ends with 0 when it never verified: that it found what it reads is counted.
    local options=(--name=two --filename=fio-two --ioengine=psync --rw=randwrite --bs=4k --size=16M --verify=crc32c --verify_fatal=1
        --verify_state_save=0 --randseed=4711)
    (cd "$A" && fio "${options[@]}" --do_verify=0 --output="$DIR/fio.out")
    (cd "$B" && fio "${options[@]}" --verify_only --output="$DIR/fio.out")
    (cd "$C" && fio "${options[@]}" --verify_only --direct=1 --output="$DIR/fio.out")
    # One page spoilt must be found, or the above says nothing.
    dd if=/dev/zero of="$C/fio-two" bs=4k seek=77 count=1 conv=notrunc status=none
    cd "$A"
    refuses fio "${options[@]}" --verify_only --output="$DIR/fio.out"
}
xattrs_and_acls() {
    local long
    long=$(printf 'v%.0s' {1..1000})
    echo x > "$A/x"
    setfattr -n user.one -v 1 "$A/x"
    setfattr -n user.long -v "$long" "$B/x"
    setfattr -n user.empty "$C/x"
    same 'names' 'user.empty user.long user.one' "$(getfattr --absolute-names "$A/x" | grep user | sort | xargs)"
    same 'a long value' "$long" "$(getfattr --absolute-names --only-values -n user.long "$C/x")"
    setfattr -x user.one "$C/x"
    refuses getfattr -n user.one "$A/x"
    chmod 640 "$A/x"
    setfacl -m u:12345:r,g:23456:rw "$A/x"
    same 'the mask' rw- "$(getfacl -cp "$B/x" | sed -n 's/^mask:://p')"
    same 'the group bits are the mask' 660 "$(stat -c %a "$C/x")"
    chmod 600 "$C/x"
    same 'chmod changes the mask' --- "$(getfacl -cp "$A/x" | sed -n 's/^mask:://p')"
    chmod 640 "$A/x"
    mkdir "$A/acl"
    setfacl -d -m u:12345:rwx,o::- "$B/acl"
    touch "$C/acl/file"
    mkdir "$C/acl/sub"
    same 'inherited' 'user:12345:rwx' "$(getfacl -cp "$A/acl/file" 2> /dev/null | grep 12345 | sed 's/[[:space:]].*//')"
    same 'inherited default' 'default:user:12345:rwx' "$(getfacl -cp "$B/acl/sub" | grep '^default:user:12345' | sed 's/[[:space:]].*//')"
    setfacl -b "$A/x"
    same 'no ACL is left' '' "$(getfacl -cps "$B/x")"
    # Enforced: a named user may, another one may not.
    setfacl -m u:12345:r "$A/x"
    chmod 750 "$A/x"
    setfacl -m m::r "$A/x"
    setpriv --reuid 12345 --regid 12345 --clear-groups cat "$B/x"
    refuses setpriv --reuid 12346 --regid 12346 --clear-groups cat "$C/x"
}
long_names() {
    local name dir=$A/names
    name=$(printf 'n%.0s' {1..255})
    mkdir "$dir"
    echo long > "$dir/$name"
    same 'bytes' long "$(cat "$B/names/$name")"
    same 'listed' "$name" "$(ls "$C/names")"
    refuses touch "$B/names/${name}n"
    mkdir "$B/names/d"
    mv "$B/names/$name" "$B/names/d/$name"
    ln "$C/names/d/$name" "$C/names/$name"
    ln -s "$name" "$A/names/link"
    same 'through a link' long "$(cat "$B/names/link")"
    # UTF-8 and bytes that are not, spaces, newlines: a name is bytes.
    local odd
    for odd in 'ä ö ü' $'new\nline' $'\xff\xfe' '-rf' '*' '"' "\\"; do
        echo odd > "$A/names/$odd"
        same "a file called $odd" odd "$(cat "$C/names/$odd")"
        rm -- "$B/names/$odd"
    done
    rm -r "$C/names"
    refuses ls -d "$A/names"
}
df_and_du() {
    mkdir "$A/space"
    local before after total
    total=$(df --output=size -B1M "$A" | tail -1 | xargs)
    [ "$total" -gt 1200 ] && [ "$total" -le 1600 ] # three arenas of 512 MiB
    before=$(df --output=avail -B1K "$B" | tail -1 | xargs)
    dd if=/dev/urandom of="$A/space/f" bs=1M count=24 status=none
    sync -f "$A/space/f"
    same 'du' $((24 * 1024)) "$(du -k "$B/space/f" | cut -f1)"
    same 'du --apparent-size' $((24 * 1024)) "$(du -k --apparent-size "$C/space/f" | cut -f1)"
    after=$(df --output=avail -B1K "$C" | tail -1 | xargs)
    echo "available: $before KiB before, $after KiB after"
    [ $((before - after)) -ge $((23 * 1024)) ] && [ $((before - after)) -le $((32 * 1024)) ]
    truncate -s 1G "$B/space/sparse"
    same 'du of a hole' 0 "$(du -k "$A/space/sparse" | cut -f1)"
    fallocate -p -o 0 -l 8M "$C/space/f"
    sync -f "$C/space/f"
    same 'du after a hole was punched' $((16 * 1024)) "$(du -k "$A/space/f" | cut -f1)"
    [ "$(df --output=itotal "$A" | tail -1)" -gt 1000 ]
}
many_tools() {
    mkdir "$A/tools"
    seq 1 100000 > "$A/tools/seq"
    same sha256sum "$(sha256sum < "$A/tools/seq")" "$(sha256sum < "$B/tools/seq")"
    sed -i 's/^7$/seven/' "$B/tools/seq"
    same 'sed -i' seven "$(sed -n 7p "$C/tools/seq")"
    sort -r -o "$C/tools/sorted" "$A/tools/seq"
    same 'sort -o' 100000 "$(wc -l < "$B/tools/sorted")"
    gzip -k "$B/tools/seq"
    gzip -dc "$C/tools/seq.gz" | cmp - "$A/tools/seq"
    cp --reflink=auto --sparse=always "$A/tools/seq" "$B/tools/copy"
    cmp "$C/tools/copy" "$C/tools/seq"
    echo one > "$A/tools/log"
    timeout 20 tail -n +1 -F "$B/tools/log" > "$DIR/tail.out" 2> /dev/null &
    local tail_pid=$!
    echo two >> "$C/tools/log"
    within 10 grep -q two "$DIR/tail.out"
    kill $tail_pid
    install -m 750 -D "$A/tools/seq" "$C/tools/a/b/c/seq"
    same mode 750 "$(stat -c %a "$B/tools/a/b/c/seq")"
    find "$B/tools" -name 'seq*' -size +100k | sort | xargs -d '\n' cksum > /dev/null
    flock "$A/tools/lock" true
    (
        flock 9
        refuses flock -n "$B/tools/lock" true
    ) 9> "$A/tools/lock"
    flock -n "$B/tools/lock" true
    # A file that one mount has open and another one removes.
    exec 8<> "$A/tools/seq.gz"
    rm "$B/tools/seq.gz"
    gzip -dc <&8 | cmp - "$C/tools/seq"
    exec 8>&-
    cp -a "$A/tools/a" "$B/tools/copied"
    same 'a copied tree' seq "$(ls "$C/tools/copied/b/c")"
    rm -r "$C/tools"
}

# A daemon does not leave programs behind that use its mount, unless it is told to.
in_use_is_said() {
    local said user status=0
    echo kept > "$C/used"
    (cd "$C" && exec sleep 60) &
    user=$!
    said=$("$VERBFS" stop --config "$DIR/verbfs.toml" --slot 2 2>&1) || status=$?
    echo "$said"
    same 'exit status' 1 $status
    [[ $said == *"$user (sleep)"* && $said == *--force* ]]
    kill "$user"
    wait "$user" || true
    exec 9< "$C/used"
    refuses "$VERBFS" unmount "$C"
    same 'what is still there' kept "$(cat <&9)"
    exec 9<&-
    rm "$A/used"
}

check git_commits 60 git_commits
check git_gc_and_fsck 60 git_gc_and_fsck
check git_clone 60 git_clone
check tar_and_diff 60 tar_and_diff
check gcc_and_run 60 gcc_and_run
check sqlite_rollback 90 sqlite_rollback
check sqlite_wal 60 sqlite_wal
check rsync_there_and_back 60 rsync_there_and_back
check fio_one_mount 120 fio_one_mount
check fio_two_mounts 90 fio_two_mounts
check xattrs_and_acls 30 xattrs_and_acls
check long_names 30 long_names
check df_and_du 30 df_and_du
check many_tools 60 many_tools
check in_use_is_said 30 in_use_is_said
check daemons_live 5 alive
if stop_cluster; then pass cluster_stops_well; else fail cluster_stops_well 'see above'; fi
finish
