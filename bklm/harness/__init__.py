"""Everything that a study does and that is no study: settings, folder, grid, comparison, report, figures."""
