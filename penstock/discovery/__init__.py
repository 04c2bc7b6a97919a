"""Who exists: leased registrations of worker instances. Nothing about load or cache."""
