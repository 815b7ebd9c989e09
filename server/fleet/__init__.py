"""The fleet: certificates, enrolment, the folder that `midge init` makes."""
