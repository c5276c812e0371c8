"""From records to tables: separate programs that read Parquet alone and never import torch."""
