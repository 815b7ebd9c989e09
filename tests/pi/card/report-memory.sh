#!/bin/sh
# Says what memory the processes of the user `midge` have: resident now, and at most so far, in kB.
while sleep 2; do
    for each in $(pgrep -u midge 2>/dev/null); do
        what=agent
        if grep -q sandbox.child "/proc/$each/cmdline" 2>/dev/null; then what=training; fi
        awk -v what=$what -v pid="$each" '/^VmHWM/ { most = $2 } /^VmRSS/ { now = $2 }
            /^RssAnon/ { own = $2 }
            END { if (now) print "memory", what, pid, "now", now, "most", most, "anonymous", own }' "/proc/$each/status" 2>/dev/null
    done
    awk '/^MemAvailable/ { print "memory machine 0 available", $2 }' /proc/meminfo
done
