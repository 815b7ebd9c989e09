#!/bin/sh
# Leaves a few lines on the boot partition for whoever puts the card into another computer.
# No secret: the agent logs none, and nothing else is read but addresses and states.
# The card is written only when the state has changed, so that it does not wear out.
set -u
log=/boot/firmware/midge/log
seen=/var/lib/midge-report
[ -d "$log" ] || exit 0

service=$(systemctl is-active midge-device.service)
if [ -e /var/lib/midge/identity.json ]; then enrolled=yes; else enrolled=no; fi
addresses=$(hostname -I 2>/dev/null | tr -s ' ')
synchronised=$(timedatectl show --property=NTPSynchronized --value 2>/dev/null)
state="service=$service enrolled=$enrolled addresses=${addresses:-none} clock-synchronised=${synchronised:-unknown}"
# A card that was flashed again has no report, whatever was said on it before.
if [ -e "$log/agent.txt" ] && [ "$(cat "$seen" 2>/dev/null)" = "$state" ]; then exit 0; fi

{
    echo "$state"
    echo "time=$(date -u '+%Y-%m-%d %H:%M') uptime-s=$(cut -d. -f1 /proc/uptime)"
    nmcli --terse --fields DEVICE,TYPE,STATE device 2>/dev/null | grep -v loopback | head -n 4 | sed 's/^/network /'
    journalctl --unit=midge-device --lines=12 --output=cat --no-pager 2>/dev/null | cut -c1-300 | sed 's/^/agent /'
} >"$log/agent.new" && mv -f "$log/agent.new" "$log/agent.txt" && sync && echo "$state" >"$seen"
