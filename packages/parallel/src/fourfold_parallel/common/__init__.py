"""The ground floor: values, records, files, compiled code, progress, workers."""
