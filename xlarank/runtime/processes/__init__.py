"""Several server processes over one copy of the tables: who holds, who serves, who looks after both.

    supervisor   what was started: looks at the repository, starts holders, answers /metrics. Holds no table
    holder       has the tables of some versions, forks its workers, and forks them anew when they die
    worker       a fork of the holder: starts JAX and gRPC, serves, and may die at any time

New versions make a new holder, forked from the one before, which inherits the tables that both serve.
"""
