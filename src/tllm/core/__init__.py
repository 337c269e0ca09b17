"""The words everyone uses: types, errors, configuration, units. Standard library only."""
