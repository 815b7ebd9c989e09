"""Putting a device's software on a card or into one file, so that no device needs the internet.

targets      which systems there are: Python, processor, runtime
wheelhouse   their wheels, pinned by hash, fetched once and kept
parcel       everything a device gets, as one folder of files: wheels, installer, unit, bundle
card         a boot partition: a mounted folder, or a file with the image of a card
images       images as they are downloaded: packed or not, looked into, copied
system       which system is on it
firstboot    what its first boot reads: cloud-init's files, or firstrun.sh
flashing     writing all that, reading it back, taking it away again
diagnosis    reading a card that came back: what happened on it, and what to do
files/       what runs on the device, as it is: install.sh, uninstall.sh, units
locks/       versions and hashes of the wheels
"""
