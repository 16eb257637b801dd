"""`sbs plan`: estimated cost of a configuration on absent TPUs, by their compiler."""
