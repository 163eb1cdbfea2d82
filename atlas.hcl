# For the Atlas command line, which is not needed to run the application:
#   atlas migrate status --env sqlite
#   atlas migrate apply --env postgres --var "url=postgres://.../app?search_path=public"
# Atlas 0.7 must also be told --dir "file://app/db/migrations/sqlite" (or postgres).
# Migrations are made with `just db-upgrade NAME`, for both databases at once.

variable "url" {
  type    = string
  default = "postgres://localhost:5432/app?search_path=public&sslmode=disable"
}

env "sqlite" {
  url = "sqlite://.data/app.db?_fk=1"
  dev = "sqlite://dev?mode=memory&_fk=1"
  migration {
    dir = "file://app/db/migrations/sqlite"
  }
}

env "postgres" {
  src = "file://app/db/schema.sql"
  url = var.url
  dev = "docker://postgres/17/dev?search_path=public"
  migration {
    dir = "file://app/db/migrations/postgres"
  }
}
